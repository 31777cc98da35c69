"""Extract, train, evaluate, predict, run: each reads top to bottom as the story of the stage."""
