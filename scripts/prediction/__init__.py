"""What scripts/predict.py is made of: the images given, names of classes, the network, its explanation, and the cards."""
