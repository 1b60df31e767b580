"""Makes classes and functions of one's own known under a name."""


def with_names(keys):
    return keys
