"""Models, pipelines and single files of Diffusers by their own calling conventions."""
