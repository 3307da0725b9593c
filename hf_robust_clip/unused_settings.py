"""Settings that would do nothing where they stand: refused, each with what would act."""
