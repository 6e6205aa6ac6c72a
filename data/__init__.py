"""How public sources become record files: modules with `build(folder)` that the stages run."""
