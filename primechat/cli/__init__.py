"""The command line: one verb per stage, and the programs that are run at a terminal."""
