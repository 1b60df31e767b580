"""Switchyard: conditional computation for MindSpore."""

__version__ = "0.2.0"
