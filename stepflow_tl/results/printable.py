"""Text from outside, made safe for a terminal."""


def printable(text: str) -> str:
    """The text with unprintable characters escaped, so that an id cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
