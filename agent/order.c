// SPDX-License-Identifier: Apache-2.0
/* Reads the keys of an order. An order with a wrong key is refused, with a fault. */
#include <string.h>

#include "agent.h"

bool refuse(struct session *s, const char *what, const char *why)
{
	snprintf(s->fault, sizeof(s->fault), "%.80s: %.160s", what, why);
	return false;
}

/* Finds the index of a key's text in `words`, which ends with NULL. */
bool take_word(struct session *s, const char *key, const char *const *words, unsigned *which)
{
	const char *text = json_text(&s->order, key);

	for (*which = 0; text && words[*which]; ++*which)
		if (!strcmp(text, words[*which]))
			return true;
	snprintf(s->fault, sizeof(s->fault), "%s must be", key);
	for (const char *const *w = words; *w; w++) {
		size_t length = strlen(s->fault);

		snprintf(s->fault + length, sizeof(s->fault) - length, "%s %s",
			 w == words ? "" : " or", *w);
	}
	return false;
}

/* Reads a number from `low` to `high`. Without the key, `*value` stays as it is. */
bool take_number(struct session *s, const char *key, double low, double high, double *value)
{
	const struct member *m = json_number(&s->order, key);

	if (m)
		*value = m->number;
	if (*value >= low && *value <= high)
		return true;
	snprintf(s->fault, sizeof(s->fault), "%s must be %.15g to %.15g", key, low, high);
	return false;
}

bool take_endpoint(struct session *s, struct endpoint *e)
{
	static const char *const transports[] = {"tcp", "udp", NULL};
	static const char *const families[] = {"ipv4", "ipv6", NULL};
	unsigned transport, family;

	if (!take_word(s, "transport", transports, &transport) ||
	    !take_word(s, "family", families, &family))
		return false;
	e->udp = transport;
	e->family = family ? AF_INET6 : AF_INET;
	return true;
}

bool taken_all(struct session *s)
{
	const char *key = json_unused(&s->order);

	return key ? refuse(s, key, "unknown key, or a value of the wrong type") : true;
}
