"""What flows: documents, tokens, chunks, bins, vectors and the table they end in."""
