"""Switchyard: conditional computation for MindSpore."""

__version__ = "0.1.0"
