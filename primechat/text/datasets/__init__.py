"""Sources of dialogues: public sets from the Hub, the user's own files, and recipes that need no download."""
