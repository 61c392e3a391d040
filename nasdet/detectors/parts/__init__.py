"""Parts shared by the detectors: locations, boxes, assignment, losses, post-processing."""
