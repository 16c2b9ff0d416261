"""Published PyTorch networks: their layouts as our parameters, and a reader of torch files that needs no PyTorch."""
