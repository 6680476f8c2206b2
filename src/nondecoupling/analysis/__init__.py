"""Theory, statistics and verdicts: functions of the results' tables that know no path."""
