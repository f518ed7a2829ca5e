"""Parts of the labs: settings, stages behind Start and Stop, predictions, exercises, twins, pages."""
