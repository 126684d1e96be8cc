"""What attends to what: the weights by layer and head, as arrays, as a page and as a picture."""
