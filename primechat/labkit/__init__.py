"""What labs are made of: settings, stages behind Start and Stop, guesses, exercises, twins, pages."""
