"""What is measured, each beside a peer or a physical limit in the same run."""
