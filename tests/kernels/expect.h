// The least that a test in C++ needs: a failed expectation says what it saw, and main returns 1.
#pragma once

#include <iostream>

namespace carillon::test {

inline int failures = 0;

template <typename Seen, typename Expected>
void expect_equal(const char* file, int line, const char* what, const Seen& seen,
                  const Expected& expected) {
  if (seen == expected) return;
  ++failures;
  std::cerr << file << ":" << line << ": " << what << " is " << seen << ", expected " << expected
            << "\n";
}

inline int report() { return failures == 0 ? 0 : 1; }

}  // namespace carillon::test

#define EXPECT_EQUAL(seen, expected) \
  ::carillon::test::expect_equal(__FILE__, __LINE__, #seen, seen, expected)
