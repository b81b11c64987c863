"""How long a judgement stands: what a read costs that finds its entry depends on asking as little as possible."""

__all__ = ["Standing"]


class Standing:
    """Counts whatever may shorten the time for which an entry can be served.

    An entry that was judged to be good until some time still is, without being judged again, as long as nothing has been
    counted since. One for all who decide about the same entries.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def shake(self) -> None:
        """Something happened after which less may be served than before: everything is judged again."""
        self.number += 1
