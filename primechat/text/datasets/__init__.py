"""Where dialogues come from: files of the Hub's sets, and recipes made from what is here."""
