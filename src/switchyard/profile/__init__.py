"""Measures where the time of a training step goes, part by part, against what each part cannot do without.

parts.py           what all networks have: a conditional layer, experts, the optimizer, as cells of their own
decoder_parts.py   the parts of a decoder's step
seq2seq_parts.py   those of an encoder-decoder's
image_parts.py     those of the image networks'
inputs.py          micro-batches to run them on
floors.py          what a part cannot do without: its matrix products, or the bytes that it moves
measure.py         times all of them in turn, and adds them up
picture.py         the table as a picture
"""
