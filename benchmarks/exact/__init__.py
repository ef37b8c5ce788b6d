"""Problems whose solution function is known, to hold what was learned against."""
