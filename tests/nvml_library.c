/* A driver's library for machines that have none: what Basestone asks of NVML, with NVML's own types.
 * NVML_CLOCK names a file that holds the seconds since the driver was loaded; a board draws 300 W, and its counter
 * begins at 5 billion mJ, which 32 bits do not hold. Boards 1 and 2 have no counter; 2 has no power reading either. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct board { unsigned number, limit_mw; } *device;
static struct board boards[3] = {{0, 700000}, {1, 700000}, {2, 700000}};
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6 };

int nvmlInitWithFlags(unsigned flags) { return flags == 0 ? SUCCESS : INVALID_ARGUMENT; }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    return code == NOT_SUPPORTED ? "Not Supported" : code == NO_PERMISSION ? "Insufficient Permissions" : "Not Found";
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *found) {
    if (index > 2) return INVALID_ARGUMENT;
    *found = &boards[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device *found) {
    unsigned number;
    if (sscanf(uuid, "GPU-%u", &number) != 1 && sscanf(uuid, "MIG-%u", &number) != 1) return NOT_FOUND;
    if (number > 2) return NOT_FOUND;
    *found = &boards[number];
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device slice, device *found) {
    *found = slice;
    return SUCCESS;
}

int nvmlDeviceGetUUID(device board, char *text, unsigned length) {
    snprintf(text, length, "GPU-%u", board->number);
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(device board, unsigned long long *mj) {
    double seconds = 0;
    FILE *clock = fopen(getenv("NVML_CLOCK"), "r");
    if (board->number) return NOT_SUPPORTED;
    if (!clock || fscanf(clock, "%lf", &seconds) != 1) return NOT_FOUND;
    fclose(clock);
    *mj = 5000000000ULL + (unsigned long long)(300000 * seconds);
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(device board, unsigned *mw) {
    if (board->number == 2) return NO_PERMISSION;
    *mw = 300000;
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementLimit(device board, unsigned *mw) {
    *mw = board->limit_mw;
    return SUCCESS;
}

/* Something else, heat perhaps, holds the boards below 650 W. */
int nvmlDeviceGetEnforcedPowerLimit(device board, unsigned *mw) {
    *mw = board->limit_mw < 650000 ? board->limit_mw : 650000;
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementLimitConstraints(device board, unsigned *lowest_mw, unsigned *highest_mw) {
    (void)board;
    *lowest_mw = 200000;
    *highest_mw = 700000;
    return SUCCESS;
}

int nvmlDeviceSetPowerManagementLimit(device board, unsigned mw) {
    board->limit_mw = mw;
    return SUCCESS;
}
