"""Plain data and arithmetic shared by every part of stowplan; imports neither torch nor ray."""
