"""What train.py, predict.py, make_graph.py and bench.py share."""
