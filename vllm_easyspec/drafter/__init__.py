"""The drafter: its plan, where its layers live, its weights, its pages, and its forward pass."""
