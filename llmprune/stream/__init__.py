"""The stream of resident decoder layers and what it observes. Independent of recipes and methods."""
