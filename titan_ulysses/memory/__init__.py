"""What makes a long sequence fit: the chunked loss head and activation checkpointing."""
