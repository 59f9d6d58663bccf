"""What training minimises: each objective says its columns, its indivisible unit, and its loss."""
