"""The sample sets: ``registry`` lists them; each other module has ``load(split)``."""
