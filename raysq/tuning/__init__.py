"""All that touches Ray Tune but the searchers: trials, their workers, the run, what it shows and records."""
