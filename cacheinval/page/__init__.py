"""The page at `/`: how the fleet is, live, for whoever is on call (PROTOCOL.md, "The page")."""

from cacheinval.page.serving import EVENTS, PATHS, Page

__all__ = ["EVENTS", "PATHS", "Page"]
