"""How fast cacheinval is, beside what people would use in its place: `make bench`, or `make bench ONLY=hit`.

Every variant runs in the same run as its peers, round by round in turn, on private servers; figures are medians of the
rounds, and ratios are taken round by round. Each variant proves its own work, or it raises.
"""
