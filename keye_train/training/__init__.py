"""How the model learns: objectives, optimizer, schedule, engine, checkpoints and the loop."""
