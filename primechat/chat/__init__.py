"""Chat with a model: a tree of messages and a session, with a terminal and a page as front ends."""
