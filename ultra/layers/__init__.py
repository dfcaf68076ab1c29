"""Parts that several mixers share: linear maps, norms without a choice, sequences, attention."""
