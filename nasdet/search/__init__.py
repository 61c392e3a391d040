"""Search algorithms. They know parameters, losses and cards; no detector and no data set."""
