"""Measures where the time of a training step goes, part by part, against what each part cannot do without.

parts.py     the parts of a decoder's step, as cells of their own
floors.py    what a part cannot do without: its matrix products, or the bytes that it moves
measure.py   times all of them in turn, and adds them up
picture.py   the table as a picture
"""
