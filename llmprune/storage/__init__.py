"""Files on disk: checkpoints, packed layouts, output folders and reports. Reads and writes bytes; builds no model."""
