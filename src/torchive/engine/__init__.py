"""Train, evaluate, predict, export, bench, compare: plain functions over the contracts, each in the module of its name.

``from torchive.engine.train import train``; likewise ``evaluate.evaluate_run``, ``predict.predict``, ``run.load_run``,
``recipe.load_recipe``, ``convert.convert``.
"""
