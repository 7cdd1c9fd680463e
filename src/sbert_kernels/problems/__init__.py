"""What a backend is handed for each operation, and what it hands back."""
