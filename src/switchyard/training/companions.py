"""Files beside a tokenizer.json that say how it is used, such as its chat template: states and exports hold them.

A checkpoint that was imported keeps them with all that its import kept, under ORIGIN; one that was made of such a
checkpoint, with another model, under TEXTS_KEY.
"""

from typing import Any

TOKENIZER_CONFIG, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
TEXTS = (TOKENIZER_CONFIG, TEMPLATE, GENERATION, "special_tokens_map.json")  # that an export takes along
ORIGIN = "huggingface"  # in the state of a checkpoint that was imported, or that began with one
TEXTS_KEY = "texts"  # in the state of a checkpoint that was made of one, with another model


def kept_texts(state: dict[str, Any]) -> dict[str, str]:
    """Returns name -> text of what the state of a checkpoint has kept of the tokenizer's companions."""
    origin = state.get(ORIGIN)
    texts = origin.get("texts") if isinstance(origin, dict) else state.get(TEXTS_KEY)
    if not isinstance(texts, dict):
        return {}
    return {name: text for name, text in texts.items() if name in TEXTS and isinstance(text, str)}
