"""nanochat: from raw text to a chat model of your own, on whatever hardware you have."""
