"""The stream of resident decoder layers and what it observes. Knows neither recipes nor methods."""
