// SPDX-License-Identifier: Apache-2.0
/* Log-linear histogram of latencies: buckets of 1 ns up to 256 ns, then 128 per doubling. */
#include "agent.h"

static unsigned bucket_of(uint64_t ns)
{
	unsigned shift = ns < 256 ? 0 : 56 - (unsigned)__builtin_clzll(ns);
	unsigned bucket;

	if (shift > 28)
		return HISTOGRAM_BUCKETS - 1;
	bucket = (shift << 7) + (unsigned)(ns >> shift);
	return bucket;
}

void histogram_add(struct histogram *h, uint64_t ns)
{
	h->count[bucket_of(ns)]++;
}

uint64_t histogram_upper_ns(unsigned bucket)
{
	unsigned shift = bucket < 256 ? 0 : (bucket >> 7) - 1;
	uint64_t mantissa = bucket - ((uint64_t)shift << 7);

	return ((mantissa + 1) << shift) - 1;
}

void histogram_print(const struct histogram *h, FILE *out)
{
	const char *separator = "";

	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
		if (!h->count[i])
			continue;
		fprintf(out, "%s[%.3f,%llu]", separator, histogram_upper_ns(i) / 1e3,
			(unsigned long long)h->count[i]);
		separator = ",";
	}
}

void histogram_merge(struct histogram *into, const struct histogram *from)
{
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
		into->count[i] += from->count[i];
}
