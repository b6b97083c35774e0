"""Models of Transformers by their own calling conventions, their captures, what `weightlift.install` replaces."""
