"""kNN-LM: what a trained model has seen, kept beside it and looked up."""
