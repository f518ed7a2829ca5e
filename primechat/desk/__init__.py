"""The desk: small programs that a person runs at a terminal."""
