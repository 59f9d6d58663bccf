"""What training minimizes: each objective says its columns, its indivisible unit, and its loss."""
