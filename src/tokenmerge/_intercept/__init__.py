"""Stand in for somebody's callable and listen to it; knows no family and no method."""
