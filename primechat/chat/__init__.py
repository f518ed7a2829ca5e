"""A chat with a model: a tree of messages and a session; the terminal and the page are skins of it."""
