"""Describes encoder-decoder models and the lengths of corrupted text. No MindSpore in here.

Legend: S tokens of an encoder's input, T tokens of a decoder's target, L tokens of a window of text.
"""

from typing import Annotated

from pydantic import Field

from switchyard.config.sections import Positive, Section

PAD, END = 0, 1  # tokens: padding, which also begins a decoder's input; the end of an input or a target
SPECIALS = 2  # of them, before the tokens of the text
SHORTEST = 3  # tokens of the shortest input: one that stays, a sentinel, the end


class Seq2SeqConfig(Section):
    """Describes the decoder of an encoder-decoder, relative positions, and span corruption (T5, arXiv 1910.10683)."""

    num_decoder_layers: Positive | None = Field(None, description="layers of the decoder; null = model.num_layers")
    relative_attention_num_buckets: Annotated[Positive, Field(ge=4, multiple_of=2)] = Field(
        32, description="buckets of relative positions, each with a bias for every head"
    )
    relative_attention_max_distance: Positive = Field(
        128, description="tokens from which on all distances share the last bucket"
    )
    initializer_factor: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor of the initial standard deviations, which are those of T5: 1 / sqrt(rows of a matrix)"
    )
    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.15, description="share of the tokens of a text that the decoder has to find"
    )
    mean_noise_span_length: Annotated[float, Field(ge=1.0)] = Field(
        3.0, description="mean tokens of a span that one sentinel replaces"
    )
    sentinels: Positive = Field(100, description="sentinel tokens <extra_id_0>, ... of the vocabulary")

    def spans(self, length: int) -> tuple[int, int]:
        """Returns (tokens that are replaced, spans of them) of a text of `length` tokens, at least 2."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, min(max(round(noise / self.mean_noise_span_length), 1), noise, length - noise)

    def corrupted(self, length: int) -> tuple[int, int]:
        """Returns (S, T) of a text of `length` tokens: what stays or goes, a sentinel for each span, and the end."""
        noise, spans = self.spans(length)
        return length - noise + spans + 1, noise + spans + 1

    def window(self, inputs: int) -> int:
        """Returns the tokens L of the longest text that gives at most S = `inputs` tokens, at least SHORTEST.

        As in T5 the targets are not longer than the inputs where half of the tokens are replaced.
        """
        share = 1 - self.noise_density + self.noise_density / self.mean_noise_span_length
        length = max(2, int(inputs / share))  # near the end of the search
        while length > 2 and self.corrupted(length)[0] > inputs:
            length -= 1
        while self.corrupted(length + 1)[0] <= inputs:
            length += 1
        found = self.corrupted(length)
        return length - 1 if self.noise_density == 0.5 and found[1] > found[0] and length > 2 else length
